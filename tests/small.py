"""The smallest runs that still have several clients and rounds, with fixed noise in place of a calibration."""

SMALLEST = [
    "federation.clients=2",
    "federation.partition=iid",
    "federation.local_steps=1",
    "federation.batch_size=16",
    "privacy.epsilon=null",
    "privacy.noise_multiplier=1.5",
]
