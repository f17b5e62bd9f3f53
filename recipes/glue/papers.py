"""What the papers print for RoBERTa-base on GLUE, columns in the order of TASKS.

GaLore is arXiv 2403.03507, its Table 4; SubTrack the NeurIPS workshop paper, its Tables 1 and 4. The two report QQP
differently: accuracy in the first, F1 in the second. MRPC is F1 and STS-B Pearson in both.
"""

ROWS = ("full", "galore_r4", "galore_r8", "lora_r4", "lora_r8", "subtrack_r4", "subtrack_r8")
"""Our rows for them, which a comparison has where none are named."""

GALORE = {
    "full fine-tuning": ("747M", 62.24, 90.92, 91.30, 79.42, 94.57, 87.18, 92.33, 92.28, 86.28),
    "GaLore (r=4)": ("253M", 60.35, 90.73, 92.25, 79.42, 94.04, 87.00, 92.24, 91.06, 85.89),
    "LoRA (r=4)": ("257M", 61.38, 90.57, 91.07, 78.70, 92.89, 86.82, 92.18, 91.29, 85.61),
    "GaLore (r=8)": ("257M", 60.06, 90.82, 92.01, 79.78, 94.38, 87.17, 92.20, 91.11, 85.94),
    "LoRA (r=8)": ("264M", 61.83, 90.80, 91.90, 79.06, 93.46, 86.94, 92.25, 91.22, 85.93),
}
"""GaLore's Table 4: memory (weights and optimizer state in bf16, without the states of the dense parameters), scores,
average."""

SUBTRACK = {
    "GaLore (r=4)": (60.34, 90.58, 92.58, 76.53, 94.27, 87.12, 92.20, 87.86),
    "SubTrack (r=4)": (61.32, 90.64, 92.66, 77.98, 94.15, 86.85, 91.85, 87.50),
    "GaLore (r=8)": (58.54, 90.61, 91.30, 74.37, 94.50, 87.34, 92.71, 87.99),
    "SubTrack (r=8)": (58.54, 90.87, 91.43, 76.53, 94.27, 87.09, 92.49, 87.57),
}
"""SubTrack's Table 4, whose averages are blank."""

SUBTRACK_SECONDS = {
    "GaLore (r=4)": (195.7, 195.1, 200.2, 325.8, 185.7, 206.8, 216.5, 190.4, 214.5),
    "SubTrack (r=4)": (155.7, 158.0, 172.7, 305.7, 147.5, 175.0, 192.2, 155.8, 182.8),
    "GaLore (r=8)": (188.0, 195.6, 196.5, 328.3, 187.1, 208.0, 217.1, 189.4, 213.7),
    "SubTrack (r=8)": (149.4, 159.1, 171.2, 304.9, 148.9, 177.1, 192.1, 156.8, 182.4),
}
"""SubTrack's Table 1: seconds of 2500 steps, average last."""
