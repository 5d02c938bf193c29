"""One file per kind of layer: how it is recognised and what its hook does. `table.py` lists them;
`formulas/` holds the equations under the same names.

Each file offers
  recognise(name, module, own) -> Site | None    by what the module computes, not by its name
  attach(site, measurement) -> context manager   hooks the site for one micro-batch
"""
