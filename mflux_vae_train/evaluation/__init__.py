"""Judge drawn images of a subject: networks, measures and evaluators."""
