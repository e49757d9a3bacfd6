"""The command line: `mmsr`. One file per command; each is imported when it is asked for."""
