"""The report: a run's artefacts as one HTML page, and its evaluation as a plain-text table.

read_run.py   the run's files -> arrays and records
outcome.py    evaluation.json -> table, differences, intervals;  verdict.py  the same in words
tables.py     composition, norms, samples as text
plot.py       axes and marks as inline SVG;  figures.py  the page's figures
page.py       all of it -> HTML, by templates/page.html;  terminal.py  the plain-text table
"""
