"""The specification of every op in plain torch: written to be read, and the fallback where nothing is compiled."""
