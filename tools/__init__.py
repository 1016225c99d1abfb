"""What stands beside the method: pictures, the memory of a run, fine-tuning."""
