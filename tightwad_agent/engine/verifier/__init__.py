"""The verifier: a process of its own that drives libllama and checks drafts. Imports nothing heavy."""
