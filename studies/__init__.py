"""Studies: many runs trained and compared, offline methods (SFT, DPO) to compare with, and a table over seeds."""
