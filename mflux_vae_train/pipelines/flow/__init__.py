"""What rectified-flow pipelines share: files, noise schedule, training prediction, sampling, estimates of memory."""
