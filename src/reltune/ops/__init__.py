"""One operator per file: forward, backward and the slow reference it must agree with. No model, no data."""
