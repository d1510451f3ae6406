"""llama.cpp: getting it, running workers, running the server over them."""
