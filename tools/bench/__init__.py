"""How fast ckptmgr and its peers save and load, side by side in one run; see `__main__`."""
