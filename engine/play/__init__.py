"""Playing: what a game is to a player, its pace, its replay, its window."""
