"""Tools around the method: pictures, the page of episodes, the memory of a run, the paper's results."""
