"""From the user's files to padded batches: sources -> formats -> tokens -> (prepared data set) ->
batches -> collate.

No module here imports torch itself; transformers, which does, is imported only when a tokenizer is
loaded.
"""
