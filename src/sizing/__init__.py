"""How many FLOPs, bytes, devices and hours a run takes."""
