"""The embedded world "flags": real flags, real country facts, and a search engine over both."""
