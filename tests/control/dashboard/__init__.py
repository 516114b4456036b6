"""Tests of `control.dashboard`."""
