@echo off
rem Starts the service; makes the environment on the first run. Arguments go to server.py.
setlocal
cd /d "%~dp0"
if not exist .venv\Scripts\python.exe (
  py -3 -m venv .venv || goto failed
  rem PyPI has only the CPU build for Windows; with an NVIDIA card take the CUDA build.
  where nvidia-smi >nul 2>nul && .venv\Scripts\python.exe -m pip install "torch>=2.10,<2.14" --index-url https://download.pytorch.org/whl/cu128
  .venv\Scripts\python.exe -m pip install -e . || goto failed
)
.venv\Scripts\python.exe server.py %*
exit /b %errorlevel%
:failed
echo Setting up failed; delete the folder .venv and try again.
exit /b 1
