"""Machines that listen: a recogniser, a speaker encoder, and what a waveform looks like to them.

Evaluation judges what was spoken with them, data preparation reads recordings with them.
"""
