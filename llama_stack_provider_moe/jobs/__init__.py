"""What a job is, and that none is lost. Standard library, pydantic and SQLAlchemy only."""
