"""Losses for many classes and for partly contoured cases."""
