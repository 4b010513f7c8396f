"""`python -m uld_serve` is `uld-serve`: for launchers that start modules, as `accelerate launch -m uld_serve train`."""

from uld_serve.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
