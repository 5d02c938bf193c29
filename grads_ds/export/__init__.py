"""The chosen subset in the data formats of other tools: one file for each, listed here.

To add a tool, add its file, with `write_rows(rows of chosen_rows.py, folder)`, and its line. The
command line reads the list; a file is imported when its tool is asked for.
"""

# what `--to` calls the tool -> (its file here, the tool's own name)
TOOLS = {
    "trl": ("trl", "TRL"),
    "llamafactory": ("llama_factory", "LLaMA-Factory"),
    "axolotl": ("axolotl", "Axolotl"),
    "megatron": ("megatron", "Megatron"),
}
