"""Report a run's public metrics to TensorBoard, W&B, Trackio or MLflow. Never at an owner's node."""
