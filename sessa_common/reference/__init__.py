"""The float64 reference: operations, models, and the comparison of a runtime with it."""
