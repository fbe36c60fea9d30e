"""python -m medgpt STAGE CONFIG.toml [section.key=value ...]"""

from medgpt.cli import main

if __name__ == "__main__":
    main()
