"""Model files: what they are, which pieces are where, and how they come here."""
