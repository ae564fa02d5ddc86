"""What a run is: one frozen dataclass per stage, composed from option files and decoded strictly. No torch."""
