"""Looking inside trained models: arrays in, arrays out. It knows no layer and no model."""
