"""`medgpt corpus`: write the sample corpus that ships with medgpt."""

from medgpt.artifacts import commit, committed, file_entries
from medgpt.config.stages import CorpusConfig
from medgpt.runs import Run
from medgpt.sample_corpus.write import write_corpus
from medgpt.stages.opening import open_run


def run_corpus(config: CorpusConfig) -> Run:
    """Write the corpus to run.dir/data unless it exists."""
    run = open_run("corpus", config)
    if committed(run.data) is None:
        with run.data.staging() as directory:
            counts = write_corpus(config, directory)
            files = file_entries(directory)
        commit(run.data, files, rows=counts, clinically_reviewed=False)
    run.update_manifest(finished=True)
    return run
