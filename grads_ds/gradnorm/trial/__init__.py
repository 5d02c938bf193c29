"""Before anything is measured: which module uses which parameter, and whether one sample's norms
are its own."""
