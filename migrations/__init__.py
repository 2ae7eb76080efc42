"""How the journal's schema came about, one numbered step after the other. Installed as ``ckptmgr.migrations``."""
