"""Tools around the method: pictures, the memory of a run, fine-tuning, the paper's results."""
