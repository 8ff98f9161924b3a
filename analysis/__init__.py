"""What a trained network learned: arrays in, numbers, figures and a report out."""
