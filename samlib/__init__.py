"""Sharpness-Aware Minimization, studied: when do flat minima help, and which gradients do the work?"""

from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent  # the checkout: notebooks/, studies/, runs/ and figures/ lie here
