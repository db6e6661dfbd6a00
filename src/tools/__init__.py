"""Programs around a run: small shells over the other rooms."""
