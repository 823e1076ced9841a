"""Training, evaluation and detection around the models: what the command line is made of."""
