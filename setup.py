"""Package metadata and dependencies. Versions that are tested stand in constraints.txt."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="megasparse",
    version="0.1.0",
    description="Distributed pretraining of transformer language models with Mixed Sparsity Training",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["megasparse", "megasparse.*"]),
    package_data={
        "megasparse": [
            "kernels/*/*.cpp",
            "kernels/*/*.h",
            "kernels/*/*.json",
            "planning/*.yaml",
            "reporting/templates/*",
            "serving/*.html",
        ]
    },
    install_requires=[
        # GPU users install their own build of torch first; the range keeps it.
        "torch>=2.8",
        "deepspeed>=0.19,<0.20",
        "numpy>=1.26",
        "pydantic>=2.7",
        "filelock>=3.16",
        "psutil>=5.9",
        "omegaconf>=2.3",
        "pyyaml>=6.0",
        "safetensors>=0.4",
        "zstandard>=0.22",
        "sentencepiece>=0.2",
        "rich>=13.0",
        "matplotlib>=3.8",
        "pillow>=10.0",
        "jinja2>=3.1",
        "mpi4py>=4.0",
        "openmpi>=5.0; sys_platform == 'linux'",
    ],
    extras_require={
        "dev": [
            "pytest>=8.0",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "hypothesis>=6.100",
            "ruff>=0.6",
            "mypy>=1.11",
            "triton>=3.4; platform_system == 'Linux'",
            "pyarrow>=15",
            "tokenizers>=0.20",
            "transformers>=4.46",
        ],
        "hf": ["tokenizers>=0.20", "transformers>=4.46"],
        "parquet": ["pyarrow>=15"],
        "monitor": ["tensorboard>=2.15"],
        "wandb": ["wandb>=0.19.10"],
        # The database in a file that runs without a server use needs the other two.
        "mlflow": ["mlflow-skinny>=2.20", "sqlalchemy>=2.0", "alembic>=1.13"],
        "eval": ["lm-eval>=0.4.9"],
        # For benchmarks/adapters.py; what it needs of the library is not all public.
        "peft": ["peft>=0.21,<0.22"],
        "serve": ["starlette>=0.46,<2", "uvicorn>=0.30"],
    },
)
