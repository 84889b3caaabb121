"""Tests of compression; a package for the moments that they share."""
