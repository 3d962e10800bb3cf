# SPDX-License-Identifier: Apache-2.0
"""The parts that the bundle's configs name: one job per file."""
