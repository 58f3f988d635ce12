"""Measurements that need more passes over the first images of a calibration: one module each."""

from .base import MEASURED_IMAGES, Measurement, Work, measurements, register

__all__ = ["MEASURED_IMAGES", "Measurement", "Work", "measurements", "register"]
