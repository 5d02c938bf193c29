"""The equation of each kind of layer, as pure tensor functions; its hook stands in the file of the
same name in `rules/`.
"""
