"""Listeners that write the trials of a run to TensorBoard, MLflow and Weights & Biases."""
