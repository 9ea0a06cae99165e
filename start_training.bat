@echo off
rem Installs trainerd on the first start, then shows its menu; with words behind it, runs that command and asks nothing:
rem   start_training  quick  standard  extended  status  monitor  stop  reinstall  or any command of trainerd
rem TRAINERD_PYTHON=C:\path\to\python.exe uses that complete environment and installs nothing.
rem No blocks in parentheses below: a folder named "trainer (1)" would end them early.
setlocal EnableExtensions DisableDelayedExpansion
set "HERE=%~dp0"
set "PYTHONUTF8=1"
set "FRESH="
if defined TRAINERD_PYTHON goto given
set "PY=%HERE%.venv\Scripts\python.exe"
if /i "%~1"=="reinstall" goto fresh
if not exist "%PY%" goto find
"%PY%" -I -S "%HERE%launcher\stamp.py"
if "%errorlevel%"=="0" goto run
goto find

:given
set "PY=%TRAINERD_PYTHON%"
if /i not "%~1"=="reinstall" if exist "%PY%" goto run
echo TRAINERD_PYTHON is set: nothing is installed then, and it must be a Python with trainerd's requirements.
echo It is: "%PY%"
echo What to do: correct it, or unset it to let start_training install by itself.
set "RC=2"
goto end

:fresh
set "FRESH=--fresh"

:find
set "BASE="
for %%V in (3.13 3.12 3.11 3.10 3.14) do if not defined BASE call :try py -%%V
if not defined BASE call :try python
if not defined BASE call :try python3
if not defined BASE goto nopython
%BASE% "%HERE%launcher\install.py" %FRESH%
set "RC=%errorlevel%"
if not "%RC%"=="0" goto end
if defined FRESH goto end

:run
"%PY%" "%HERE%launcher\start.py" %*
set "RC=%errorlevel%"
goto end

:try
%* "%HERE%launcher\probe.py" >nul 2>nul
if not "%errorlevel%"=="0" goto :eof
set "BASE=%*"
goto :eof

:nopython
echo Not installed: no 64-bit Python from 3.10 to 3.14 was found.
for %%P in (py python python3) do call :tell %%P
echo What to do: install Python 3.13 from https://www.python.org/downloads/windows/ or with
echo     winget install Python.Python.3.13
echo then start again.
set "RC=4"
goto end

:tell
%* "%HERE%launcher\probe.py" 2>nul
goto :eof

:end
rem Double-clicked, the window would vanish with the reason.
if not "%RC%"=="0" if "%~1"=="" pause
exit /b %RC%
