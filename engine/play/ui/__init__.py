"""The window: keys in, pictures out. Only this package and play.py import pygame."""
