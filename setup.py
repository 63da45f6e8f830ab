from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="mpp",
    version="0.1.0",
    description="Masked patch pretraining of Vision Transformers, and honest evidence of whether it helped",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    # mpp/eval and mpp/recipes are links to the top-level folders, so that one package installs everything.
    packages=find_packages(include=["mpp", "mpp.*"]),
    package_data={"mpp": ["py.typed"], "mpp.eval.report": ["*.css"], "mpp.recipes": ["*.yaml", "*/*.yaml"]},
    entry_points={"console_scripts": ["mpp = mpp.cli:main"]},
    # Why each of these is here: docs/design.md, "Dependencies".
    install_requires=[
        "torch>=2.11",
        "torchvision>=0.26",
        "einops>=0.8",
        "pyyaml>=6",
        "safetensors>=0.8",
        "fsspec>=2024.12",
        "numpy>=2.0",
        "pillow>=11",
        "simplejpeg>=1.8",
        "opencv-python-headless>=4.10",
        "scikit-learn>=1.5",
        "scipy>=1.13",
        "tensorboard>=2.18",
        "tqdm>=4.66",
    ],
    extras_require={
        "remote": ["fsspec[http]>=2024.12", "s3fs>=2024.12"],
        "onnx": ["onnx>=1.23", "onnxscript>=0.7", "onnxruntime>=1.32"],
        "test": [
            "pytest>=8",
            "pytest-xdist>=3.6",
            "ruff>=0.12",
            "mypy>=1.15",
            "webdataset>=1.0",
            "timm>=1.0",
            "transformers>=5.0",
            "markdown-it-py>=3",
            "fsspec[http]>=2024.12",
            "s3fs>=2024.12",
            "moto[server]>=5",
            "onnx>=1.23",
            "onnxscript>=0.7",
            "onnxruntime>=1.32",
        ],
        "bench": ["timm>=1.0", "vit-pytorch>=1.11", "webdataset>=1.0", "lightly>=1.6", "transformers>=5.0"],
    },
)
