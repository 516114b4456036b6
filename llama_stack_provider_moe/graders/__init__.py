"""What gives answers their rewards, without torch: the same code for training, HTTP and the command line.

samples         an answer and its row, what graders make of it, and how one fails
templates       the texts of a template for an answer
calls           the tool calls in an answer
refusals        whether an answer refuses, answers, or is neither
here            graders of linear time, in the process that asks
bounded         the work of a process that grades: patterns, schemas, similarity, mathematics
child           that process
bench           keeps such processes, with limits of time and memory
judges          models at URLs that the operator names
opening         a grader's spec -> a grader that is ready
panel           all rewards of a job: values by grader, their sum, and how many may fail
document        what graders made of answers, as a report
request         rewards and answers as one JSON object, for a process with torch
"""
