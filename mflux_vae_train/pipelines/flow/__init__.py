"""What rectified-flow pipelines share: noise schedule, training prediction, sampling."""
