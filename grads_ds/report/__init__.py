"""The report: a run's artefacts as one HTML page, and its evaluation as a plain-text table.

read_run.py   the run's files -> arrays and records
outcome.py    evaluation.json -> table, differences, intervals;  verdict.py  the same in words
forgetting.py  gain and forgetting;  what_to_do.py  in words;  forgetting_figure.py  the picture
composition.py, method_comparison.py, task_table.py  tables;  examples.py  samples as text
row_table.py  rows to look up: row_choice.py (which), row_words.py (why), shaded_tokens.py (losses)
plot.py       axes and marks as inline SVG;  figures.py  the page's figures
page.py       the list of sections, and all of them -> HTML, by templates/;  sections.py  what each
              shows
text_table.py the plain-text tables
"""
