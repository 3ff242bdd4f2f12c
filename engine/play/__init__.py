"""Playing: what a game is to a player, its rate (schedule.py), its figures (timings.py: fps, latency), its
replay; the window with its keys and HUD is ui/.
"""
