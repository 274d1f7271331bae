"""Defences, by when they act: cleansing before training, training, scanning and repair after it."""
