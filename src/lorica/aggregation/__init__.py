"""Server-side processing of aggregated updates, independent of the method: functions of released tensors only."""
